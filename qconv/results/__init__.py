"""The results of each command as data, without rendering."""
