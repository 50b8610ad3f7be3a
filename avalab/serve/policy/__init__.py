"""What a server decides: sizes, times and texts in, decisions out; nothing here imports torch or waits for anything."""
