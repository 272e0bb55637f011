"""A package to pytest: what its fixtures of that scope start ends with the last of its tests."""
