"""How open a base is, by its card and licence, and which clients' policies accept it. None of this is legal advice."""
