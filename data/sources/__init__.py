"""Sources of images and labels: folders, zip archives, WebDataset shards, Hugging Face datasets, IDX files, digits."""
