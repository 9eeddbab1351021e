"""Parameters in files, in everybody's layout: read, named, written."""
