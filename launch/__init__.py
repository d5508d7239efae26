"""`python -m launch`: trains and evaluates models of distfit from the command line."""
