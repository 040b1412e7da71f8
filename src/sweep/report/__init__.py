"""Reports: from the rows alone to figures, tables, a page and answers. No torch."""
