"""Files that must not be lost: committed folders, their encodings, run folders and their lock."""
