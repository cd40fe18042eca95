if live then return old end
return false
