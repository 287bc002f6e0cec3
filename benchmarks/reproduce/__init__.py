"""Published and exact numbers, each by a script that prints them beside ours."""
