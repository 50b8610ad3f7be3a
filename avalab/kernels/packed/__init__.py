"""Products of packed weights of 2 to 8 bits, without the decoded weight: the layout, its products, native code."""
