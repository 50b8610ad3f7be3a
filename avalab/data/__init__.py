"""What models read, and how examples are made."""
