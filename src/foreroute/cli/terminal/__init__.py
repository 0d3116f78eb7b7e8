"""How do lines that a person types become messages?"""
