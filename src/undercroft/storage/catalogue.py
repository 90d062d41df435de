"""The catalogue: names of public cloud images, where they are fetched from and how they are checked."""
