"""How a linear layer multiplies in fewer bits than bf16, which layers do so, and what it costs them."""
