"""What is asked of a trained pair: draws, evidence, files."""
