"""Claims of two papers, tested on data that pip packages ship: ``flowops bench papers``."""
