"""The web console: it starts runs as processes of their own and reads their directories. Never imports torch."""
