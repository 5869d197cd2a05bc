"""What every request and answer passes, whatever it asks for: bodies, errors, fields, streams."""
