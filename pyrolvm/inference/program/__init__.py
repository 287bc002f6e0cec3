"""A model/guide pair as data: what it is made of, and every way to run it."""
