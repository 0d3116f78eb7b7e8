"""An answer's text as it arrives, to content, reasoning and tool calls: one file for each family of formats."""
