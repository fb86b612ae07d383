"""The ground floor: errors, plugin lookup and what this machine is. Imports nothing of hasten."""
