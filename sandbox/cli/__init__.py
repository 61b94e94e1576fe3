"""The command line: parses and prints only. Facts go to standard output, our own words to standard error."""
