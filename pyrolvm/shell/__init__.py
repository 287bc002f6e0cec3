"""The shell: commands made from the signatures of what they call; `pyrolvm.cli` is its door."""
