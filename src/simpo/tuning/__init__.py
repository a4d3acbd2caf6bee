"""Choosing settings: `simpo sweep` tries them, `simpo calibrate` proposes them."""
