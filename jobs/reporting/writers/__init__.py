"""What writes the blocks of a report: as HTML, as Markdown, as pictures."""
