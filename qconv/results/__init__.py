"""What was found, as data: the report of each command. No rendering."""
