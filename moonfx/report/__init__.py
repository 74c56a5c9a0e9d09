"""What moonfx did, as a table, a dict and JSON."""
