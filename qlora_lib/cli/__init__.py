"""The commands of `python -m qlora_lib`, a file for each group."""
