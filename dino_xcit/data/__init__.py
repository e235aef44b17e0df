"""Images: where they come from, how they are read, cropped and handed out."""
