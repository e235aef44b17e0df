"""What a backbone attends to: figures, videos, an interactive page, a score."""
