"""The scenarios: functions that add their figures to a Bench."""
