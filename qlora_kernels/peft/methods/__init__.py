"""The PEFT methods."""
