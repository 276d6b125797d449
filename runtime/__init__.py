"""What keeps a long run alive. Nothing here changes what is learned or imports the root."""
