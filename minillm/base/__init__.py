"""What everything stands on: errors, files that are whole or not there, the machine, processes, optional packages."""
