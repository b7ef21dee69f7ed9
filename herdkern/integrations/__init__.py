"""Doors into other libraries: importing changes nothing; `register()` and `patch(model)` do, and are taken back."""
