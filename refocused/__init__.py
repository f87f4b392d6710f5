from refocused import entry as entry  # before all others: it says what this machine lacks
