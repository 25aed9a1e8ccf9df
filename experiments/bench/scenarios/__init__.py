"""The scenarios: functions of their names, which add figures to a Bench."""
