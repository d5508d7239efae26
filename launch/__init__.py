"""`python -m launch`: trains, evaluates and verifies models from the command line."""
