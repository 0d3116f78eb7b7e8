"""How fast is it? Measurements of speed and bytes, with the ceilings they are held against."""
