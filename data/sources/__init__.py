"""Where images and labels come from: folders, archives, shards, Hugging Face datasets, digits."""
