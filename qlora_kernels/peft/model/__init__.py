"""PeftModel, and the functions that work on one."""
