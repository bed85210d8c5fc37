"""From records alone to tables, figures, the paper's beside one's own, and one HTML page."""
