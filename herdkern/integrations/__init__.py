"""Doors into other libraries: each module changes its library only when its register() is called."""
