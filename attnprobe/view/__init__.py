"""What a browser is told about logged runs: the same for the Attention tab and for a report in one file. No torch."""
