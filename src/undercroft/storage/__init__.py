"""Images, volumes, and what is built into them."""
