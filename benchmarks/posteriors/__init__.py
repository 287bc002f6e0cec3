"""Posteriors with known answers, and what each way of fitting makes of them."""
