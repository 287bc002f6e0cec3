"""The shell: `pyrolvm fit`, `sample`, `encode`, ...; `pyrolvm.cli` is its door."""
