"""Write files and folders atomically (completely or not at all), and read them with one-line errors."""
