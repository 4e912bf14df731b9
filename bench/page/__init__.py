"""The report page: pictures as SVG, tables that sort, one HTML file."""
