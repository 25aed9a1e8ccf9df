"""A base that brings Python code of its own: not run unless the recipe says so."""

import json
from pathlib import Path
from shutil import copytree

import pytest

from engine.config.sections import Model
from engine.models.base_model import causal_config, read_base
from engine.models.tokenizer import load_tokenizer


@pytest.fixture
def with_code(bases: dict[str, Path], tmp_path: Path) -> Path:
    """A Llama under a name that transformers does not know, whose code leaves a mark wherever it is run."""
    folder = copytree(bases["tied"], tmp_path / "with_code")
    (folder / "code.py").write_text(f"open({str(tmp_path / 'was_run')!r}, 'w').close()\nclass Mine: pass\n")
    _merge(
        folder / "config.json",
        model_type="mine",
        auto_map={"AutoConfig": "code.Mine", "AutoModelForCausalLM": "code.Mine"},
    )
    _merge(folder / "tokenizer_config.json", tokenizer_class="Mine", auto_map={"AutoTokenizer": [None, "code.Mine"]})
    return folder


def _merge(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize("read", [causal_config, read_base, load_tokenizer])
def test_it_is_refused_and_not_run(with_code: Path, read: object) -> None:
    with pytest.raises(ValueError, match=r"with_code' needs model\.trust_remote_code = true, which runs code that"):
        read(Model(base=str(with_code)))  # type: ignore[operator]
    assert not (with_code.parent / "was_run").exists()


def test_where_transformers_knows_the_class_it_takes_its_own(with_code: Path) -> None:
    _merge(with_code / "config.json", model_type="llama")
    _merge(with_code / "tokenizer_config.json", tokenizer_class="PreTrainedTokenizerFast")
    model = Model(base=str(with_code))
    assert type(causal_config(model)).__name__ == "LlamaConfig"
    read_base(model), load_tokenizer(model)
    assert not (with_code.parent / "was_run").exists()
