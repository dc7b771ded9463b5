"""What a recipe may say about each kind of step; light, so that reading a recipe stays so."""
