"""How fast function calls are answered, and whether the fast answers are the slow ones."""
