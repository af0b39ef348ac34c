"""Small attention models that train for all seeds at once, and what came of them."""
